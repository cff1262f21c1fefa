"""The models of this domain; importing this registers them."""

from domains.forecasting.models import chronos2 as chronos2
from domains.forecasting.models import miga as miga
from domains.forecasting.models import ncpp as ncpp
