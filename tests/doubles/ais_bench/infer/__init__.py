"""A stand-in for Ascend's ais_bench, over that for aclruntime."""
