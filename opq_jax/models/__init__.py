"""Networks in Flax Linen: those of the paper's experiments, and language models; a module a family.

Flax is imported when a class of this room is first used: `names` and `create`'s errors need none.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy
from opq_jax.models.configurations import from_config
from opq_jax.models.registry import create, names, variable_shapes

if TYPE_CHECKING:
  from opq_jax.models.alexnet import AlexNet
  from opq_jax.models.bert import SentenceEncoder
  from opq_jax.models.decoder import Cache, Decoder
  from opq_jax.models.generation import generate, sample
  from opq_jax.models.gpt2 import GPT2
  from opq_jax.models.llama import Llama
  from opq_jax.models.mobilenet import MobileNetV1, MobileNetV2
  from opq_jax.models.perplexity import Evaluation, evaluate
  from opq_jax.models.resnet import ResNet
  from opq_jax.models.vgg import VGG16

__all__ = [
  'GPT2',
  'VGG16',
  'AlexNet',
  'Cache',
  'Decoder',
  'Evaluation',
  'Llama',
  'MobileNetV1',
  'MobileNetV2',
  'ResNet',
  'SentenceEncoder',
  'create',
  'evaluate',
  'from_config',
  'generate',
  'names',
  'sample',
  'variable_shapes',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'AlexNet': 'alexnet',
    'Cache': 'decoder',
    'Decoder': 'decoder',
    'Evaluation': 'perplexity',
    'GPT2': 'gpt2',
    'Llama': 'llama',
    'MobileNetV1': 'mobilenet',
    'MobileNetV2': 'mobilenet',
    'ResNet': 'resnet',
    'SentenceEncoder': 'bert',
    'VGG16': 'vgg',
    'evaluate': 'perplexity',
    'generate': 'generation',
    'sample': 'generation',
  },
)
