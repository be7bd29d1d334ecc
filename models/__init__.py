"""Flax NNX decoders over jaxkv caches, and the loading of published checkpoints into them."""

from models.checkpoints.checkpoint import Checkpoint as Checkpoint
from models.checkpoints.open import NAMES as NAMES
from models.checkpoints.open import open_checkpoint as open_checkpoint
from models.config import DecoderConfig as DecoderConfig
from models.decoder import Decoder as Decoder
from models.errors import CheckpointError as CheckpointError
from models.families.architectures import architecture_config as architecture_config
from models.load import load as load
from models.random_weights import random_model as random_model
