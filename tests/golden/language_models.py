"""Makes `language_models.npz`: what transformers computes with the networks of the tests.

    pip install torch transformers
    python -m tests.golden.language_models

An array a configuration of `tests.helpers.language_models`: the logits of its tokens, or the
embeddings of sentences, in float32 on the CPU.  Weights are drawn by their names, which are
transformers' own here.
"""

import importlib.metadata
import pathlib

import numpy as np

from tests.helpers.language_models import CONFIGS, TOKENS, drawn

PATH = pathlib.Path(__file__).with_suffix('.npz')


def padded_tokens():
  """Two sentences, the second of which is shorter."""
  tokens = TOKENS.copy()
  tokens[1, 8:] = 0
  return tokens


def answer(config):
  # here, since the tests collect this module, and run without transformers
  import torch
  import transformers

  options = dict(config)
  made = transformers.AutoConfig.for_model(options.pop('model_type'), **options)
  kind = transformers.AutoModelForCausalLM
  if config['model_type'] == 'bert':
    kind = transformers.AutoModel
  model = kind.from_config(made, attn_implementation='eager').float().eval()
  prefix = 'bert.' if config['model_type'] == 'bert' else ''
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(torch.from_numpy(drawn(prefix + name, tuple(parameter.shape))))
    if config['model_type'] != 'bert':
      return model(torch.from_numpy(TOKENS).long()).logits.numpy()
    tokens = torch.from_numpy(padded_tokens()).long()
    mask = tokens > 0
    hidden = model(tokens, attention_mask=mask.long()).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


if __name__ == '__main__':
  np.savez_compressed(PATH, **{name: answer(config) for name, config in CONFIGS.items()})
  version = importlib.metadata.version('transformers')
  print(f'{PATH}: {PATH.stat().st_size:,} bytes, transformers {version}')
