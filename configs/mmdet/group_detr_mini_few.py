# A small Group DETR from scratch, a minute or two on people of a few images.
_base_ = ["./_base_/group_detr_r50.py", "./_base_/few.py"]

model = dict(name="group_detr_mini", num_classes=1, backbone=dict(_delete_=True, name="resnet_mini"))
train_cfg = dict(max_iters=300, val_interval=300)
default_hooks = dict(checkpoint=dict(interval=300), logger=dict(interval=20))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
