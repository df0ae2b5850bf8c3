"""Tensors of transformers and variables of `opq_jax.models`, both ways."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from opq_jax import models
from opq_jax.importers import language_models
from opq_jax.weights import open_weights
from tests.helpers.language_models import CONFIGS, network, write_folder


@pytest.mark.parametrize('name', ['llama_biases', 'qwen3', 'gpt2_wide', 'bert'])
def test_to_tensors_is_the_inverse(name):
  model, tensors = network(name)
  variables = language_models.from_tensors(model, tensors).variables
  found = language_models.to_tensors(model, variables)
  assert found.keys() == tensors.keys()
  for key, tensor in tensors.items():
    np.testing.assert_array_equal(found[key], tensor, err_msg=key)
    assert found[key].flags.c_contiguous


def test_layers_are_stacked():
  model, tensors = network('llama')
  variables = language_models.from_tensors(model, tensors).variables
  for layer in range(2):
    np.testing.assert_array_equal(
      variables['params']['layers']['gate']['kernel'][layer],
      tensors[f'model.layers.{layer}.mlp.gate_proj.weight'].T,
    )


def test_from_tensors_reads_files_and_keeps_dtypes(tmp_path):
  model, tensors = network('gpt2')
  stored = open_weights(write_folder(tmp_path / 'gpt2', 'gpt2') / 'model.safetensors')
  expected = language_models.from_tensors(model, tensors).variables
  jax.tree.map(
    np.testing.assert_array_equal,
    language_models.from_tensors(model, stored).variables,
    expected,
  )
  narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
  variables = language_models.from_tensors(model, narrow).variables
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
  back = language_models.to_tensors(model, variables)
  assert all(back[name].tobytes() == tensor.tobytes() for name, tensor in narrow.items())


@pytest.mark.parametrize(('name', 'base'), [('qwen2', 'model.'), ('gpt2', 'transformer.')])
def test_names_may_lack_the_base(name, base):
  model, tensors = network(name)
  short = {key.removeprefix(base): tensor for key, tensor in tensors.items()}
  found = language_models.from_tensors(model, short)
  expected = language_models.from_tensors(model, tensors)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  back = language_models.to_tensors(model, found.variables, with_base=False)
  assert back.keys() == short.keys()


def test_ignored_tensors_are_named():
  model, tensors = network('bert')
  more = {'pooler.dense.weight': np.zeros((32, 32)), 'embeddings.position_ids': np.arange(64)}
  assert language_models.from_tensors(model, {**tensors, **more}).ignored == tuple(more)
  model, tensors = network('gpt2')
  more = {
    'h.0.attn.bias': np.ones((1, 1, 64, 64)),
    'lm_head.weight': tensors['transformer.wte.weight'],
  }
  assert language_models.from_tensors(model, {**tensors, **more}).ignored == tuple(more)


def test_from_tensors_names_every_difference():
  model, tensors = network('llama')
  wrong = dict(tensors)
  del wrong['model.norm.weight']
  wrong['model.layers.1.mlp.up_proj.weight'] = np.zeros((32, 48), np.float32)
  wrong['model.layers.2.mlp.up_proj.weight'] = np.zeros((48, 32), np.float32)
  with pytest.raises(ValueError) as error:
    language_models.from_tensors(model, wrong)
  assert str(error.value).splitlines() == [
    'the tensors are not those of a Llama of transformers:',
    '  model.layers.1.mlp.up_proj.weight: found shape (32, 48), expected (48, 32)',
    '  model.layers.2.mlp.up_proj.weight: found shape (48, 32), expected no such tensor',
    '  model.norm.weight: not found, expected shape (32,)',
  ]


def test_untied_head_needs_configuration():
  model, tensors = network('llama')
  head = tensors['model.embed_tokens.weight'] + 1
  with pytest.raises(ValueError, match=r'lm_head.weight: found other values than those of model.e'):
    language_models.from_tensors(model, {**tensors, 'lm_head.weight': head})


def test_layers_of_two_dtypes_are_refused():
  model, tensors = network('llama')
  name = 'model.layers.1.self_attn.q_proj.weight'
  with pytest.raises(ValueError, match=f'{name}: found float16, expected float32 as in model.lay'):
    language_models.from_tensors(model, {**tensors, name: tensors[name].astype(np.float16)})


def test_to_tensors_names_every_difference():
  model, tensors = network('llama')
  params = dict(language_models.from_tensors(model, tensors).variables['params'])
  del params['norm']
  with pytest.raises(ValueError, match=r'a Llama of transformers:\n  params/norm/scale: not found'):
    language_models.to_tensors(model, {'params': params})
  with pytest.raises(ValueError, match='model: found VGG16, expected one of SentenceEncoder, L'):
    language_models.places(models.VGG16())


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('llama', {'model_type': 'gemma3'}, "model_type: found 'gemma3', expected one of llama, mistr"),
    ('llama', {'hidden_size': None}, 'config.json: found no hidden_size, expected one'),
    ('llama', {'hidden_act': 'gelu'}, "hidden_act: found 'gelu', expected 'silu' or 'swish'"),
    (
      'llama',
      {'quantization_config': {'bits': 4}},
      r'quantization_config: found .*, expected no',
    ),
    ('llama', {'rope_scaling': {'type': 'linear'}}, 'rope_scaling: found no factor for rope_type'),
    (
      'llama',
      {
        'rope_scaling': {
          'rope_type': 'llama3',
          'factor': 8.0,
          'low_freq_factor': 4.0,
          'high_freq_factor': 1.0,
        }
      },
      'rope_scaling: found low_freq_factor 4 and high_freq_factor 1, expected no smaller',
    ),
    (
      'llama',
      {'rope_parameters': {'rope_type': 'yarn'}},
      "rope_parameters: found rope_type 'yar",
    ),
    (
      'gpt2',
      {'activation_function': 'relu'},
      "activation_function: found 'relu', expected 'gelu",
    ),
    (
      'qwen2_window',
      {'max_window_layers': 1},
      'layer_types: found full_attention, sliding_attention, expected full_attention in all layers',
    ),
    ('bert', {'position_embedding_type': 'relative_key'}, 'position_embedding_type: found'),
    ('llama', {'model_type': ['llama']}, r'model_type: found .+, expected a name'),
    ('llama', {'num_hidden_layers': 1 << 40}, 'num_hidden_layers: found'),
    ('llama', {'vocab_size': True}, "vocab_size: found 'True', expected a whole number from 1"),
    ('llama', {'hidden_size': -32}, "hidden_size: found '-32', expected a whole number from 1"),
    ('llama', {'hidden_size': '32'}, "hidden_size: found '32', expected a whole number from 1"),
    ('llama', {'rms_norm_eps': float('nan')}, "rms_norm_eps: found 'nan', expected a number"),
    ('llama', {'rope_scaling': [8]}, r"rope_scaling: found '\[8\]', expected an object"),
    (
      'llama',
      {'rope_scaling': {'rope_type': ['linear'], 'factor': 2.0}},
      r"rope_scaling: found rope_type \['linear'\]",
    ),
    (
      'llama',
      {'rope_scaling': {'rope_type': 'linear', 'factor': 'x'}},
      "factor: found 'x', expected a number",
    ),
    ('qwen2', {'layer_types': [{}]}, r"layer_types: found '\[{}\]', expected a list of names"),
    ('llama', {'rms_norm_eps': None}, 'rms_norm_eps: found null, expected a number, or no'),
    ('gpt2', {'n_positions': None}, 'n_positions: found null, expected a number'),
    ('llama', {'rope_scaling': {'rope_type': 'linear', 'factor': None}}, 'factor: found null'),
    ('llama', {'tie_word_embeddings': 'false'}, "tie_word_embeddings: found 'false', expec"),
    ('llama', {'num_key_value_heads': 3}, 'num_key_value_heads: found 3, expected a divisor of 4'),
    ('llama', {'head_dim': 7}, 'found 7 features in a head, expected pairs'),
    ('gpt2', {'n_head': 5}, 'features in 5 heads, expected as many in each'),
  ],
)
def test_configurations_of_other_networks_are_refused(name, changes, message):
  with pytest.raises(ValueError, match=message):
    models.from_config({**CONFIGS[name], **changes})


def test_configurations_have_the_defaults_of_transformers():
  sizes = {'vocab_size': 40, 'hidden_size': 512, 'num_hidden_layers': 2, 'intermediate_size': 8}
  sizes |= {'num_attention_heads': 64}
  found = {
    kind: models.from_config({'model_type': kind} | sizes)
    for kind in ('llama', 'mistral', 'qwen2', 'qwen3')
  }
  fields = 'key_heads', 'head_features', 'positions', 'window', 'is_tied', 'has_bias'
  assert {kind: [getattr(model, field) for field in fields] for kind, model in found.items()} == {
    'llama': [64, 8, 2048, None, False, False],
    'mistral': [8, 8, 131072, 4096, False, False],
    'qwen2': [32, 8, 32768, None, False, True],
    'qwen3': [32, 128, 32768, None, False, False],
  }


def test_configurations_of_transformers_5():
  """Its rope_parameters say what rope_theta and rope_scaling said."""
  config = {key: value for key, value in CONFIGS['llama_3'].items() if not key.startswith('rope_')}
  rope = CONFIGS['llama_3']['rope_scaling'] | {'rope_theta': 100.0}
  assert models.from_config(config | {'rope_parameters': rope}) == network('llama_3')[0]
