"""The table of finetuned networks: one line a command, over its seeds."""

import json

from experiments import result_tables


def write(folder, name, command, finetuned, *, inference_only=True, **last):
  rows = [
    {'network': network, 'top1': top1, 'file_bytes': size, 'file_rate': round(1000 / size, 3)}
    for network, top1, size in (
      ('float32', 0.9, 1000),
      ('one shot', 0.6, 50),
      ('one shot, corrected', 0.7, 50),
      ('finetuned, its file', *finetuned),
    )
  ]
  rows[-1] |= last
  document = {
    'command': f'python -m experiments.finetune --config=configs/x.py:20 --workdir=DIR{command}',
    'config': {'model': 'resnet20', 'inference_only': inference_only},
    'rows': rows,
  }
  (folder / name).mkdir()
  (folder / name / 'results.json').write_text(json.dumps(document))


def test_finetune_joins_seeds(tmp_path):
  write(tmp_path, 'a', ' --config.epochs=2', (0.89, 50))
  write(tmp_path, 'a_seed1', ' --config.epochs=2 --config.seed=1', (0.88, 51))
  write(tmp_path, 'a_seed2', ' --config.epochs=2 --config.seed=2', (0.87, 49))
  write(tmp_path, 'b', ' --config.epochs=3', (0.91, 40))
  # before files had contexts the same command gave another file
  write(tmp_path, 'old', ' --config.epochs=2', (0.86, 100), contexts='no')
  old, three, other = result_tables.finetune(tmp_path)
  assert three == {
    'network': 'resnet20',
    'file, times smaller': '20.01',
    'file, bytes': '50',
    'float32': '90.00 %',
    'one shot': '60.00 %',
    'BatchNorm corrected': '70.00 %',
    'finetuned (lowest to highest)': '88.00 % (87.00 to 89.00)',
    'seeds': 3,
    'to float32, points': '-2.00',
    'contexts': 'yes',
    'of inference only': 'yes',
    'command': '`:20 epochs=2`',
    'results': '`a`, `a_seed1`, `a_seed2`',
  }
  assert (old['results'], old['contexts']) == ('`old`', 'no')
  assert (other['finetuned (lowest to highest)'], other['seeds']) == ('91.00 %', 1)
  assert other['command'] == '`:20 epochs=3`'
