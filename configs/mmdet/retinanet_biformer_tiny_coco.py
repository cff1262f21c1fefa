# RetinaNet on BiFormer-T with ImageNet weights, which are fetched, on COCO.
_base_ = ["./_base_/retinanet_biformer_tiny.py", "./_base_/coco.py"]

model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="biformer_tiny_in1k")))
