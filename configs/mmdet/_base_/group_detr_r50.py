# Group DETR of the zoo, as published: 11 groups of 300 queries in training, one in inference.
custom_imports = dict(imports=["domains.detection.openmmlab.register"], allow_failed_imports=False)

model = dict(
    type="ZooDetector",
    name="group_detr_r50",
    num_classes=80,
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1,
    ),
    backbone=dict(name="resnet50", init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50")),
    test_cfg=dict(max_per_img=100),
)
