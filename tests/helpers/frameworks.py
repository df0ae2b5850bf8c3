"""The networks of the support matrix: small, of every framework, trained on handwritten digits.

Several are the same function with the same weights, which were trained once
(`python -m experiments.benchmarks.accuracy.support_matrix --train`): what the library finds for one
of them it must find for all.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from opq_jax import correction
from opq_jax.core import trees
from opq_jax.weights import read_weights
from tests.helpers import framework_modules as modules

TRAINED = pathlib.Path(__file__).parent / 'trained'
TEST = 297  # held-out images


class Network(NamedTuple):
  """A trained network of one framework.

  Attributes:
    params: its tree: parameters, or all variables where it has BatchNorm.
    fn: (params, images [batch, 8, 8]) -> logits.
    kernels: the paths of the leaves that it multiplies, and how many leading axes count slices.
  """

  params: Any
  fn: Callable[..., Any]
  kernels: dict[str, int]


@functools.cache
def digits():
  """(images [1797, 8, 8], labels) in a random order, the first `TEST` of them held out."""
  from sklearn.datasets import load_digits

  pixels, labels = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  images = pixels[order].reshape(-1, 8, 8).astype(np.float32)
  images = (images - images[TEST:].mean()) / images[TEST:].std()
  return images, labels[order].astype(np.int32)


def held_out():
  """(images, labels) that no network has seen."""
  images, labels = digits()
  return jnp.asarray(images[:TEST]), jnp.asarray(labels[:TEST])


def calibration_inputs(count=256):
  """Images without labels."""
  return jnp.asarray(digits()[0][TEST : TEST + count])


@functools.cache
def trained(name):
  """The trained weights of a network, in its first form."""
  flat = read_weights(TRAINED / f'{name}.safetensors')
  return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat, sep='/'))


ATTENTION = tuple(f'attention/{name}' for name in ('query', 'key', 'value', 'out'))
OF_BLOCK = (*ATTENTION, 'up', 'down')
OF_CNN = ('conv_0', 'conv_1', 'head')
OF_PLAIN = ('hidden_0', 'hidden_1', 'head')


def linen_cnn():
  kernels = {f'params/{name}/kernel': 0 for name in OF_CNN}
  return Network(trained('cnn'), modules.Cnn().apply, kernels)


def nnx_cnn():
  functional = correction.from_nnx(modules.NnxCnn(nnx.Rngs(0)))
  return Network(trained('cnn'), functional.apply_fn, linen_cnn().kernels)


def haiku_cnn():
  network = modules.haiku_cnn()
  params, state = network.init(jax.random.key(0), calibration_inputs(2), True)
  functional = correction.from_haiku(network.apply, params, state)
  weights, statistics = trained('cnn')['params'], trained('cnn')['batch_stats']
  for name in OF_CNN:
    params[name] = {'w': weights[name]['kernel'], 'b': weights[name]['bias']}
  stored = {}
  for name in ('norm_0', 'norm_1'):
    as_images = lambda leaf: leaf.reshape(1, 1, 1, -1)
    norm = weights[name]
    params[name] = {'scale': as_images(norm['scale']), 'offset': as_images(norm['bias'])}
    stored |= {f'{name}/{key}': as_images(leaf) for key, leaf in statistics[name].items()}
  variables = {'params': params, 'batch_stats': stored}
  return Network(variables, functional.apply_fn, {f'params/{name}/w': 0 for name in OF_CNN})


def linen_transformer():
  blocks = [f'block_{layer}/{name}' for layer in range(modules.LAYERS) for name in OF_BLOCK]
  kernels = {f'params/{name}/kernel': 0 for name in ('embed', *blocks, 'head')}
  return Network(trained('transformer'), modules.Transformer().apply, kernels)


def stacked_transformer():
  """The parameters with all blocks in one stack."""
  params = dict(trained('transformer')['params'])
  blocks = [params.pop(f'block_{layer}') for layer in range(modules.LAYERS)]
  return {**params, 'blocks': jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def linen_scan():
  kernels = {'params/embed/kernel': 0, 'params/head/kernel': 0}
  kernels |= {f'params/blocks/{name}/kernel': 1 for name in OF_BLOCK}
  return Network({'params': stacked_transformer()}, modules.Transformer('scan').apply, kernels)


def nnx_transformer():
  graph, _, rest = nnx.split(modules.NnxTransformer(nnx.Rngs(0)), nnx.Param, ...)
  fn = lambda params, x: nnx.merge(graph, nnx.State(params), rest)(x)
  kernels = {name.removeprefix('params/'): slices for name, slices in linen_scan().kernels.items()}
  return Network(stacked_transformer(), fn, kernels)


def linen_experts():
  kernels = {f'params/{name}/kernel': 0 for name in ('embed', 'head', 'block/experts/router')}
  kernels |= {f'params/block/{name}/kernel': 0 for name in ATTENTION}
  kernels |= {f'params/block/experts/{name}': 1 for name in ('first', 'second')}
  return Network(trained('experts'), modules.Transformer('experts').apply, kernels)


def equinox_network():
  import equinox as eqx  # of the extra `test`

  model = modules.equinox_transformer()(jax.random.key(0))
  arrays, static = eqx.partition(model, eqx.is_array)
  weights = trained('transformer')['params']
  renamed = {'query_proj': 'query', 'key_proj': 'key', 'value_proj': 'value', 'output_proj': 'out'}

  def leaf_of(name, leaf):
    """Linen's leaf, its kernel as (outputs, inputs)."""
    parts = name.replace('blocks/', 'block_').split('/')
    *layers, last = [renamed.get(part, part) for part in parts]
    found = functools.reduce(lambda node, key: node[key], layers, weights)
    if last != 'weight':
      return (found[last] if isinstance(found, dict) else found).reshape(leaf.shape)
    return found['scale'] if 'scale' in found else found['kernel'].reshape(leaf.shape[::-1]).T

  names = trees.named_leaves(arrays)
  params = trees.replaced(arrays, {name: leaf_of(name, leaf) for name, leaf in names.items()})
  kernels = {name: 0 for name, leaf in names.items() if name.endswith('weight') and leaf.ndim == 2}
  return Network(params, lambda params, x: jax.vmap(eqx.combine(params, static))(x), kernels)


def plain_function():
  return Network(trained('plain'), modules.plain, {f'{name}/w': 0 for name in OF_PLAIN})


NETWORKS = {
  'Linen, CNN with BatchNorm': linen_cnn,
  'Linen, attention': linen_transformer,
  'Linen, attention, nn.scan and nn.remat': linen_scan,
  'Linen, experts by einsum': linen_experts,
  'NNX, CNN with BatchNorm': nnx_cnn,
  'NNX, attention, nnx.scan': nnx_transformer,
  'Haiku, CNN with BatchNorm': haiku_cnn,
  'Equinox, attention': equinox_network,
  'a plain function': plain_function,
}

FIRST_FORMS = {
  'Linen, attention, nn.scan and nn.remat': 'Linen, attention',
  'NNX, attention, nnx.scan': 'Linen, attention',
  'NNX, CNN with BatchNorm': 'Linen, CNN with BatchNorm',
  'Haiku, CNN with BatchNorm': 'Linen, CNN with BatchNorm',
}
"""Networks that have the weights of another one, in axes of the same order."""


def has_batch_norm(net):
  return isinstance(net.params, dict) and 'batch_stats' in net.params


@functools.cache
def network(name):
  return NETWORKS[name]()
