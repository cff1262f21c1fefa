"""The models of the atoms domain; importing this package registers them."""

from domains.atoms.models import allscaip as allscaip
from domains.atoms.models import escaip as escaip
