"""Mask R-CNN as tensors and arrays: pictures in, detections with run-length encoded masks out.

Knows torch, torchvision and numpy; no Ray, no storage, no table.
"""
