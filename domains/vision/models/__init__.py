"""The models of the vision domain; importing this package registers them."""

from domains.vision.models import biformer as biformer
from domains.vision.models import efficientvit as efficientvit
from domains.vision.models import lwganet as lwganet
