"""Texts of `opq --help` and `opq COMMAND --help`, around the lists of options."""

OPQ = """\
Compresses neural networks: one-shot pruning and quantization from the weights
alone, without data or finetuning, into small .opq files."""

OPQ_EXAMPLES = """\
examples:
  opq compress resnet50.safetensors resnet50.opq
      3.2 bits per weight instead of 32
  opq compress model.pth model.opq --bits-per-weight 2
      2 bits per weight
  opq compress --model resnet50 resnet50.pth resnet50.opq
      a known network: its BatchNorm is corrected too
  opq inspect model.opq
      list the leaves and the four sizes
  opq report model.opq model.html
      a page with charts of all leaves
  opq verify model.opq --against model.safetensors
      recompute every claim of the file
  opq decompress model.opq model.safetensors
      back to plain arrays
  opq demo
      a tour in two minutes

environment:
  OPQ_JAX_CACHE    folder of compiled programs, which later runs use again
                   (default: opq_jax in $XDG_CACHE_HOME or ~/.cache); 0: none

`opq COMMAND --help` describes a command.
"""

COMPRESS = """\
Reads weights, prunes and quantizes every floating-point matrix and kernel, and
writes an .opq file. All other leaves are stored bit for bit: integers, vectors
(also of shape 1x1xC), and what a name says to be a bias, the scale of a
normalization, a mask, a running statistic or a table of positions. --include
and --exclude override the names. Of an optimizer's state one number a leaf
is kept: the mean of second moments, 0 for first moments. The optimizer's
state in a file of PyTorch or Keras is left out.

IN is a .safetensors, .npz, .msgpack (Flax), .pt, .pth, .bin, .ckpt or .th
(needs torch), .h5, .hdf5 or .keras (needs h5py), .gguf (needs gguf), .onnx
(needs onnx) or .opq file, a Core ML package (.mlpackage, needs coremltools), a
model folder of Hugging Face, or the folder of an Orbax checkpoint. Of a model
folder the file carries config and tokenizer too. Of an ONNX file or a package
the graph tells which tensors are weights. float64 leaves are compressed as
float32.

The language model of a folder (Llama, Mistral, Qwen2, Qwen3, GPT-2), or of a
GGUF file, which is taken for the folder of the same model, is run on random
tokens, for what an error in each tensor costs its answers. With
--calibration it reads a text, or writes one, and codes are chosen for it. A
BERT, as an encoder of sentences, is run with --calibration or --objective
divergence alone.

With --model, IN holds the weights of one of the networks below, from any
framework that has it. The file then records which network it holds, so it can
be evaluated, and decompressed under the original framework's names. Pruning
and quantization shift the inputs of BatchNorm, so its statistics are corrected
as well; this needs no data. Without the correction a network of few bits per
weight is not usable before finetuning. Paths of leaves are those of Flax
(params/conv_1/kernel). Other networks are not run: a note names statistics or
biases that no longer fit, and the function of opq_jax.correction to use.
"""

COMPRESS_EXAMPLES = """\
examples:
  opq compress model.safetensors model.opq
      32 / 10 = 3.2 bits per weight; pruning and quantization chosen jointly
  opq compress model.safetensors model.opq --bits-per-weight 2
      2 bits per weight, the same as --rate 16
  opq compress model.safetensors model.opq --file-rate 8
      a file 8 times smaller than IN, everything counted
  opq compress model.safetensors model.opq --sparsity 0.74 --bits 3
      the paper's two targets: 74 % pruned, 3 bits per surviving weight
  opq compress model.pth model.opq --exclude '*embed*' 'fc.*'
      keep embeddings and the last layer as they are
  opq compress checkpoints/ model.opq --include 'params/*'
      compress only params of an Orbax CheckpointManager's latest step
  opq compress SmolLM2-135M/ smollm2.opq --bits-per-weight 4
      a model folder of Hugging Face: all shards, config and tokenizer
  opq compress SmolLM2-135M/ smollm2.opq --calibration book.txt --trellis
      codes chosen block after block, for what the text gives the layers
  opq compress --model resnet50 resnet50.pth resnet50.opq
      detects the framework; the file records it
  opq compress --model resnet20 --feedback --rate 16 net.pth net.opq
      a more accurate network in a file of the same size
  opq compress --model resnet20 --trellis --feedback --rate 16 net.pth net.opq
      more accurate still
  opq compress --model resnet20 --layer-by-layer --feedback --trellis
      --images photos/ net.pth net.opq
      most accurate; layers and BatchNorm are calibrated on unlabelled images
  opq compress --model resnet20 --inference-only net.pth net.opq
      about a tenth smaller where the network is small
  opq compress --model resnet50 --source timm resnet50_a1.pth resnet50.opq
      timm uses torchvision's names, but another preprocessing
"""

INSPECT = """\
Lists the leaves and the four sizes of an .opq file. Reads every byte and checks
every checksum."""

INSPECT_EXAMPLES = """\
examples:
  opq inspect model.opq
  opq inspect model.opq --json | jq .totals.file_rate
"""

REPORT = """\
Writes one HTML page that shows an .opq file: metadata, the four sizes, sparsity,
bits and bytes of every leaf, histograms of the codes, and what is dead; of two
files, both side by side. The page needs no network. A file that is dropped on
it is read in the browser, and leaves the machine for nowhere."""

REPORT_EXAMPLES = """\
examples:
  opq report model.opq model.html
  opq report model_4_bits.opq model_3_bits.opq both.html
      leaf by leaf, with differences
"""

CARD = """\
Writes a model card of Hugging Face: Markdown with front matter, of what the
file says of itself."""

CARD_EXAMPLES = """\
examples:
  opq card model.opq --base Qwen/Qwen2.5-0.5B --out README.md
"""

VERIFY = """\
Recomputes every claim of an .opq file from the original weights: names, shapes,
dtypes, the code of every weight, errors and sizes, and that all other leaves
are stored bit for bit. The exit code is 1 if a claim does not hold."""

VERIFY_EXAMPLES = """\
examples:
  opq verify model.opq --against model.safetensors
  opq verify model.opq --against model.safetensors --json | jq '.problems[]'
  opq verify resnet50.opq --against resnet50.pth
      for a file made with --model: imports the weights again and repeats the
      BatchNorm correction; for one made with --feedback, --trellis or
      --layer-by-layer, chooses the codes again (floating-point results must
      be those of the machine that made the file)
  opq verify resnet50.opq --against resnet50.pth --images photos/
      for a file made with --images
"""

DECOMPRESS = """\
Writes the decoded weights as a .safetensors file, or with --into as an .onnx
file or a Core ML package. A file made with --model is written under the names
that its weights came with. A file made of a model
folder becomes a folder again, which must be new or empty."""

DECOMPRESS_EXAMPLES = """\
examples:
  opq decompress model.opq model.safetensors
      arrays by name; names of a nested tree are joined by '/'
  opq decompress smollm2.opq SmolLM2-135M-again/
      for a file made of a model folder: shards, config, tokenizer
  opq decompress resnet50.opq resnet50.safetensors
      for a file made with --model: the names of the original framework
  opq decompress --to flax resnet50.opq resnet50.safetensors
      Flax's names: params/stem/kernel, batch_stats/stem_bn/mean, ...
"""

EXPORT = """\
Writes a compressed network for another runtime. Nothing is rounded again.

An ONNX file or a Core ML package gets the weights of an .opq file in the places
of its own: indices, and the values that occur. A leaf that is no such palette
stays in floats, and is named. Every runtime of ONNX reads the file, as fast as
the float network (needs onnx: pip install opq_jax[onnx]). Core ML reads the
package from iOS 18 and macOS 15 on (needs coremltools: opq_jax[coreml]).

Without --into, an .onnx file is the network that the file itself names: one of
opq compress --model has the input images and the output logits, one of a model
folder the input tokens and the output logits or embeddings, each of any number
(needs jax2onnx: opq_jax[jax2onnx]).

A .stablehlo file is the program of a network without its weights, of
jax.export, for a file made with --model (needs flatbuffers:
opq_jax[stablehlo]). It takes the codes of the .opq file as arguments."""

EXPORT_EXAMPLES = """\
examples:
  opq compress net.onnx net.opq
  opq export net.opq small.onnx --into net.onnx
  opq compress net.mlpackage net.opq
  opq export net.opq small.mlpackage --into net.mlpackage
  opq compress --model mobilenet_v1 weights.safetensors net.opq
  opq export net.opq net.onnx
  opq export net.opq net.stablehlo
"""

EVALUATE = """\
Says how well a language model predicts a text: its perplexity, and with
--against, how far its answers are from those of another model, in nats a token.
95 % intervals are over the windows of the text. A text of any length is read in
windows; the first token of a window has no context in it, and is not counted
unless an earlier window has counted it.

MODEL is a folder of Hugging Face (Llama, SmolLM2, Mistral, Qwen2, Qwen3, GPT-2),
or an .opq or .gguf file of one. No special tokens are added to the text. Needs
tokenizers for --text: pip install opq_jax[language]."""

EVALUATE_EXAMPLES = """\
examples:
  opq evaluate smollm2/ --text book.txt
  opq evaluate smollm2.opq --text book.txt --against smollm2/
      what compression has changed
  opq evaluate smollm2.opq --text book.txt --window 1024 --stride 512
      every token but the first window's has 512 tokens of context or more
  opq evaluate iglm.opq --tokens sequences.json --json
      texts that are tokens already
"""

GENERATE = """\
Lets a language model continue a prompt, up to its end token. MODEL is a folder
of Hugging Face (Llama, SmolLM2, Mistral, Qwen2, Qwen3, GPT-2), or an .opq or
.gguf file of one. Needs tokenizers: pip install opq_jax[language]."""

GENERATE_EXAMPLES = """\
examples:
  opq generate smollm2.opq --prompt 'The capital of France is'
  opq generate smollm2.opq --prompt 'Once upon a time' --tokens 200
      --temperature 0.8 --top-p 0.95 --seed 1
"""

DEMO = """\
Trains a small network on handwritten digits, compresses, finetunes, writes,
reads and evaluates it. Needs scikit-learn: pip install opq_jax[demo]."""

DEMO_EXAMPLES = """\
examples:
  opq demo
  opq demo --seed 1 --rate 16 --output digits.opq
"""
