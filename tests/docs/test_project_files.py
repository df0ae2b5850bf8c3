"""Workflow files, pre-commit's configuration and CITATION.cff: valid, and true of the project."""

import re

import pytest
import yaml

from tests.helpers import snippets

ROOT = snippets.ROOT
FILES = sorted([*ROOT.glob('.github/workflows/*.yml'), ROOT / '.pre-commit-config.yaml'])


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_yaml_parses(path):
  assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize('name', ['tests', 'release'])
def test_workflow_jobs(name):
  workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / f'{name}.yml').read_text())
  assert {'name', 'permissions', 'jobs'} <= workflow.keys()
  triggers = workflow[True]  # `on` is a boolean of YAML 1.1
  assert ('tags' in triggers['push']) == (name == 'release')
  for job in workflow['jobs'].values():
    assert job['runs-on'] and job['steps']
    for step in job['steps']:
      assert ('uses' in step) != ('run' in step)
      assert step.get('uses', './').startswith('./') or re.search(r'@[\w./-]+$', step['uses'])


def test_release_publishes_without_token():
  """Trusted publishing: only the last job may ask for an identity, and no secret is read."""
  path = ROOT / '.github' / 'workflows' / 'release.yml'
  jobs = yaml.safe_load(path.read_text())['jobs']
  assert [name for name, job in jobs.items() if 'permissions' in job] == ['publish']
  assert jobs['publish']['permissions'] == {'id-token': 'write'}
  assert jobs['publish']['needs'] == 'build'
  assert 'secrets.' not in path.read_text()


def test_pre_commit_hooks():
  config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
  hooks = [hook for repo in config['repos'] for hook in repo['hooks']]
  assert [hook['id'] for hook in hooks] == ['ruff-check', 'ruff-format', 'mypy']


def test_citation_fields():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['cff-version'] == '1.2.0' and citation['type'] == 'software'
  assert citation['title'] == 'opq_jax' and citation['authors']
  (paper,) = citation['references']
  assert [author['family-names'] for author in paper['authors']] == [
    *('Hu', 'Peng', 'Zhu', 'Aly', 'Lin')
  ]
  assert paper['year'] == 2021 and paper['identifiers'][0]['value'] == 'arXiv:2205.11141'
  changes = (ROOT / 'CHANGELOG.md').read_text()
  assert re.search(rf'^## {re.escape(str(citation["version"]))}\b', changes, re.MULTILINE)


def test_readme_length():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 200


def test_images_exist():
  """Pictures that pages show are files of the repository."""
  for name, path in snippets.pages().items():
    text = path.read_text()
    found = re.findall(r'!\[[^\]]*\]\(([^)]+)\)', text)
    found += re.findall(r'^```\{figure\} (\S+)$', text, re.MULTILINE)
    for target in found:
      assert (path.parent / target).exists(), f'{name}: found no file {target}'


def test_readme_links():
  """Links of README.md to files."""
  for page in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'):
    for target in re.findall(r'\]\(([^)#:]+)\)', (ROOT / page).read_text()):
      assert (ROOT / target).exists(), f'{page}: found no file {target}'


def test_architecture_lists_rooms():
  table = (ROOT / 'docs' / 'architecture.md').read_text().partition('## Principles')[0]
  rows = re.findall(r'^\| \d+ \| (.*?) \|', table, re.MULTILINE)
  listed = [room for row in rows for room in re.findall(r'`(\w+)`', row)]
  assert sorted(listed) == sorted(path.parent.name for path in ROOT.glob('opq_jax/*/__init__.py'))
