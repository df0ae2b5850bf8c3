"""Language models compressed by opq_jax, llama.cpp, GPTQ, HQQ and rounding, judged alike."""
