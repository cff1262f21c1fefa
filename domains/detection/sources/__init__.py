"""Where annotated images come from: json of COCO, CrowdPose and LabelMe, YOLO text, Pascal VOC xml."""
