# Group DETR, ResNet-50, on COCO: 12 epochs, the backbone at a tenth of the learning rate.
_base_ = ["./_base_/group_detr_r50.py", "./_base_/coco.py"]

optim_wrapper = dict(
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(_delete_=True, custom_keys={"backbone": dict(lr_mult=0.1)}),
)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1)]
