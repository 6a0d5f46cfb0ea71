"""Typed settings of the training stream; the keys of a training config's `data:` that decide its crops and workers."""

from pydantic import BaseModel, ConfigDict, Field


class StreamConfig(BaseModel):
    """How the photographs of shard sets become crops, and who makes them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    canonical_groups: int = Field(default=1, ge=1)
    """Fixed parts G of the data; a node that serves some of them reads only their shards. Part of the order."""
    crop: int = Field(default=256, ge=32)
    """Side of a training crop, px."""
    boxes_per_photo: int = Field(default=16, ge=1)
    """Size of the finite plan of crop boxes (with flips) of a photograph; a cached teacher feature belongs to a box."""
    crops_per_decode: int = Field(default=1, ge=1)
    """Crops taken each time a photograph is decoded."""
    margin: int = Field(default=80, ge=0)
    """Most px that crop boxes keep from the photograph's edge where its size allows: blur reads light from beyond.
    Half the largest extent that is drawn is enough; recorded pairs keep none."""
    max_bad_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Part of a training set's samples that may be unreadable; they are replaced and reported. 0: none."""
    window: int = Field(default=8, ge=1)
    """Shards whose samples are mixed with each other."""
    workers: int = Field(default=2, ge=0)
    """Loader processes per rank; 0 makes pairs in the training process."""
    stall_minutes: float = Field(default=5.0, gt=0)
    """Wait for one batch after which the run ends, with what every loader process is doing."""
