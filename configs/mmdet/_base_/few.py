# People on a few images, to see that all works: the validation images of $COCO are trained on and judged.
default_scope = "mmdet"
data_root = "{{$COCO:data/coco/}}"
people = dict(
    type="CocoDataset",
    data_root=data_root,
    ann_file="annotations/person_keypoints_val2017.json",
    data_prefix=dict(img="{{$COCO_VAL:val2017/}}"),
    metainfo=dict(classes=("person",)),
)
resize = dict(type="Resize", scale=(160, 160), keep_ratio=True)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            resize,
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
        **people,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            resize,
            dict(type="LoadAnnotations", with_bbox=True),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ],
        **people,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file=f"{data_root}/annotations/person_keypoints_val2017.json", metric="bbox"
)
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=60, val_interval=60)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=10)]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=5),
    checkpoint=dict(type="CheckpointHook", interval=60, by_epoch=False),
)
log_processor = dict(by_epoch=False, window_size=5)
randomness = dict(seed=0)
