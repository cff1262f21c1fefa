"""The models of the vision domain; importing this package registers them."""

from domains.vision.models import agent as agent
from domains.vision.models import biformer as biformer
from domains.vision.models import davit as davit
from domains.vision.models import dhvt as dhvt
from domains.vision.models import efficientvit as efficientvit
from domains.vision.models import halonet as halonet
from domains.vision.models import inline as inline
from domains.vision.models import litv2 as litv2
from domains.vision.models import lwganet as lwganet
from domains.vision.models import mala as mala
from domains.vision.models import spectformer as spectformer
from domains.vision.models import sret as sret
