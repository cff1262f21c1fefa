"""From series in any form to forecasts: `Forecaster`."""

from domains.forecasting.pipeline.forecaster import Forecaster as Forecaster
