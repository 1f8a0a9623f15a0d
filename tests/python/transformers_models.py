"""Tiny random models of transformers, and prompts for them, that several test modules use."""

import torch
import transformers

torch.set_num_threads(1)  # for such small models, threads cost more than they bring

VOCABULARY = 128
DECODER_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # else the answers are one token over and over
}
SLIDING_WINDOW = 16


def config_of(kind):
    if kind == "llama":
        return transformers.LlamaConfig(**DECODER_SIZES)
    if kind == "qwen2":
        return transformers.Qwen2Config(**DECODER_SIZES)
    if kind == "qwen3":
        return transformers.Qwen3Config(**DECODER_SIZES)
    if kind == "mistral":
        return transformers.MistralConfig(**DECODER_SIZES, sliding_window=SLIDING_WINDOW)
    if kind == "t5":
        return transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=3,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=None,
            initializer_factor=4.0,
            tie_word_embeddings=False,
        )
    return transformers.Gemma3TextConfig(
        **DECODER_SIZES,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
    )


def model_of(kind, place, seed=0):
    torch.manual_seed(seed)
    config = config_of(kind)
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    return auto.from_config(config).to(place).eval()


def prompt(place, batch=1, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator).to(place)


def generate(model, input_ids, cache=None, mask=None, **options):
    """The tokens of 24 steps, or as the options say; None lets generate() make its cache."""
    torch.manual_seed(7)
    if mask is None:
        mask = torch.ones_like(input_ids)
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    return model.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)
