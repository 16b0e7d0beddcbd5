"""Chat templates of several kinds, written for the tests, and a tokenizer that knows their control tokens."""

from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Every turn by itself."""

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""CHATML with the assistant's words marked."""

INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + "
    "' [/INST]' }}{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
"""No prompt to go on, a beginning of its own, and some roles refused."""

THINKING = (
    "{% set last = namespace(query=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set words = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thoughts = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in "
    "message.content else '' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > last.query and (loop.last or thoughts) %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}"
    "{% endif %}{{ words + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Drops what was thought before the last question, and gives the last answer empty thoughts if it has none."""

PROMPTED_THINKING = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' + "
    "message.content.split('</think>')[-1] + '<|im_end|>' }}{% else %}{{ '<|im_start|>' + message.role + '\n' + "
    "message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""The prompt to go on asks for thoughts, and no turn shows any."""

SHUFFLED = (
    "{% for message in messages | reverse %}{{ '<|im_start|>' + message.role + '\n' + message.content[::-1] + "
    "'<|im_end|>' }}{% endfor %}"
)
"""Nothing stands where it is looked for."""


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, and control tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer
