"""Where annotated images come from: COCO and CrowdPose json, YOLO text files, Pascal VOC xml."""
