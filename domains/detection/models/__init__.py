"""The models of the detection domain; importing this package registers them."""

from domains.detection.models import group_dab as group_dab
from domains.detection.models import group_deformable as group_deformable
from domains.detection.models import group_detr as group_detr
from domains.detection.models import group_pose as group_pose
