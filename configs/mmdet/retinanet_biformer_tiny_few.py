# RetinaNet with a narrow head on BiFormer-T from scratch, a minute or two on people of a few images.
_base_ = ["./_base_/retinanet_biformer_tiny.py", "./_base_/few.py"]

model = dict(
    backbone=dict(drop_path_rate=0.0),
    neck=dict(out_channels=64),
    bbox_head=dict(num_classes=1, in_channels=64, feat_channels=64, stacked_convs=1),
)
