"""Composition: the commands, and what each of them does with cluster, maskrcnn_core and schemas."""
