"""The models of the super-resolution domain; importing this package registers them."""

from domains.superres.models import catanet as catanet
from domains.superres.models import dlgsanet as dlgsanet
