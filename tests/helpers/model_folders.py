"""Small model folders as transformers writes them."""

import json

import ml_dtypes
import numpy as np
import safetensors.numpy

CONFIG = {'model_type': 'llama', 'tie_word_embeddings': True, 'hidden_size': 32}


def llama_tensors(layers=2):
  """Tensors of a small Llama in bfloat16, with a tied head."""
  draw = np.random.default_rng(0).laplace
  bfloat16 = lambda *shape: draw(size=shape).astype(ml_dtypes.bfloat16)
  tensors = {'model.embed_tokens.weight': bfloat16(96, 32), 'model.norm.weight': bfloat16(32)}
  for layer in range(layers):
    place = f'model.layers.{layer}'
    tensors[f'{place}.self_attn.q_proj.weight'] = bfloat16(32, 32)
    tensors[f'{place}.mlp.down_proj.weight'] = bfloat16(32, 64)
    tensors[f'{place}.input_layernorm.weight'] = bfloat16(32)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  return tensors


def write_folder(path, tensors, shards=1):
  """Writes a folder of safetensors, with config and tokenizer."""
  path.mkdir()
  (path / 'config.json').write_text(json.dumps(CONFIG, indent=2))
  (path / 'tokenizer.json').write_text(json.dumps({'vocab': {f'w{i}': i for i in range(96)}}))
  names, about = list(tensors), {'format': 'pt'}
  if shards == 1:
    safetensors.numpy.save_file(tensors, path / 'model.safetensors', about)
    return path
  files = [f'model-{i + 1:05}-of-{shards:05}.safetensors' for i in range(shards)]
  for i, file in enumerate(files):
    part = {name: tensors[name] for name in names[i::shards]}
    safetensors.numpy.save_file(part, path / file, about)
  total = sum(tensor.nbytes for tensor in tensors.values())
  places = {name: files[i % shards] for i, name in enumerate(names)}
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  (path / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
  return path


def write_torch_folder(path, tensors, shards=1, **options):
  """Writes a folder of PyTorch state dicts, equal arrays sharing their memory."""
  import torch

  path.mkdir()
  (path / 'config.json').write_text(json.dumps(CONFIG))
  known = {id(array): _to_torch(array) for array in tensors.values()}
  state = {name: known[id(array)] for name, array in tensors.items()}
  if shards == 1:
    torch.save(state, path / 'pytorch_model.bin', **options)
    return path
  files = [f'pytorch_model-{i + 1:05}-of-{shards:05}.bin' for i in range(shards)]
  places = {name: files[i % shards] for i, name in enumerate(state)}
  for file in files:
    part = {name: tensor for name, tensor in state.items() if places[name] == file}
    torch.save(part, path / file, **options)
  index = json.dumps({'metadata': {}, 'weight_map': places})
  (path / 'pytorch_model.bin.index.json').write_text(index)
  return path


def _to_torch(array):
  import torch

  if array.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)
