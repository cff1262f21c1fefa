"""The models of the traffic domain; importing this package registers them."""

from domains.traffic.models import gman as gman
from domains.traffic.models import st_link as st_link
from domains.traffic.models import st_llm as st_llm
from domains.traffic.models import stid as stid
