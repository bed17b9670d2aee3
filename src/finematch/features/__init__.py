"""Frozen networks and what they make: backbones, proposals, regions, fragments, token states."""
