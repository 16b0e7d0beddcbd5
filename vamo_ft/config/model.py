"""The `model` section: what is loaded, in which precision, and what of it is trained."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vamo_ft.config.section import Section

__all__ = ["AdapterConfig", "ModelConfig", "QuantizationConfig"]


class AdapterConfig(Section):
    """A LoRA adapter (Hu et al., arXiv 2106.09685); only the adapter is trained and saved."""

    type: Literal["lora"] = Field(description="kind of adapter")
    r: int = Field(8, gt=0, description="rank of each update")
    alpha: float = Field(16.0, gt=0, description="scale: the update is multiplied by alpha / r, or alpha / sqrt(r)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability on the adapter's input")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of the layers to adapt, or all-linear"
    )
    modules_to_save: list[str] = Field([], description="layers to train in full beside the adapter")
    use_rslora: bool = Field(False, description="rank-stabilised scale alpha / sqrt(r) (arXiv 2312.03732)")

    @field_validator("target_modules")
    @classmethod
    def _some_layer_is_adapted(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("names no layer; write the names of some, or all-linear")
        return value


class QuantizationConfig(Section):
    """The base's matrices in 4 bits, under an adapter (QLoRA, arXiv 2305.14314); needs bitsandbytes."""

    bits: int = Field(description="bits of a weight: 4")
    type: Literal["nf4", "fp4"] = Field("nf4", description="code of 16 values: quantiles of a normal, or floats")
    double_quant: bool = Field(True, description="quantise the scales of the blocks too: 0.37 bits a weight less")
    compute_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="precision of the products")

    @field_validator("bits")
    @classmethod
    def _bits_are_supported(cls, value: int) -> int:
        if value != 4:
            raise ValueError(f"must be 4, not {value}")
        return value


class ModelConfig(Section):
    """The model and what of it is trained."""

    path: str = Field(min_length=1, description="Hub id, local folder, or .gguf file (dequantised)")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub model")
    task: Literal["causal_lm", "sequence_classification"] = Field(
        "causal_lm", description="causal_lm, or sequence_classification: a classifier head on the pooled output"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="precision of the weights in memory; adapters stay in float32. For bfloat16 arithmetic on float32 "
        "weights set training.autocast",
    )
    quantization: QuantizationConfig | None = Field(
        None, description="frozen base in 4 bits, such as {bits: 4}; null: in dtype, or in the 4 bits it is stored in"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="attention kernel; null lets transformers choose (sdpa, where the model has it)"
    )
    compile: bool = Field(
        False,
        description="torch.compile the model's layers, for training and losses; generation stays as it is. Compiling "
        "takes some minutes at the start of every process",
    )
    adapter: AdapterConfig | None = Field(None, description="null trains the model's own weights")
    freeze: list[str] = Field(
        [], description="shell-style patterns of parameter names that are not trained, such as '*embed*'"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; off for safety")

    @model_validator(mode="after")
    def _quantised_weights_are_not_trained(self) -> "ModelConfig":
        if self.quantization is None:
            return self
        if self.adapter is None:
            raise ValueError("quantization: quantised weights are not trained; add model.adapter, or leave it out")
        if self.path.endswith(".gguf"):
            raise ValueError("quantization: a .gguf file is dequantised; leave it out, or name another model")
        return self

    @field_validator("dtype", mode="before")
    @classmethod
    def _float16_is_for_inference(cls, value: Any) -> Any:
        if value == "float16":
            raise ValueError(
                "float16 weights are for inference: updates and probe points need the range of bfloat16 or float32"
            )
        return value
