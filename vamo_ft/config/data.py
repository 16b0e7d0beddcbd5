"""The `data` section: which rows, and how they become tokens."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vamo_ft.config.section import Section


class DataSetConfig(Section):
    """One data set."""

    path: str = Field(min_length=1, description="local .jsonl .json .csv .parquet file or folder, or a Hub data set id")
    name: str | None = Field(None, description="configuration of a Hub data set")
    split: str | None = Field(None, description="split of a Hub data set or folder; default train")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub data set")
    limit: int | None = Field(None, gt=0, description="use the first rows only")


class ClassificationFormat(Section):
    """Label words after a prompt (causal_lm), or a classifier head (sequence_classification)."""

    type: Literal["classification"] = Field(description="classification, prompt_completion, chat or text")
    template: str = Field(description="the prompt, with columns in braces: '{sentence} It was'")
    label: str = Field("label", description="column of the label")
    labels: dict[str, str] = Field(
        min_length=2,
        description="label value -> text that follows the prompt, its leading space included; the order numbers the "
        "classes",
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _keys_are_text(cls, value: Any) -> Any:
        return {str(key): text for key, text in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _label_texts_differ(self) -> "ClassificationFormat":
        if len(set(self.labels.values())) < len(self.labels):
            raise ValueError("labels: two labels have the same text and could not be told apart")
        return self


class PromptCompletionFormat(Section):
    """A prompt and the text to learn; the end-of-text token is appended to the completion."""

    type: Literal["prompt_completion"] = Field(description="prompt_completion, classification, chat or text")
    prompt: str = Field("{prompt}", description="the prompt, with columns in braces")
    completion: str = Field("{completion}", description="the text to learn, with columns in braces")


class ChatFormat(Section):
    """Conversations through the tokenizer's chat template; what the assistant says is learnt."""

    type: Literal["chat"] = Field(description="chat, classification, prompt_completion or text")
    messages: str = Field(
        "messages",
        description="column of the conversation: a list of {role, content}, or of ShareGPT's {from, value}",
    )
    tools: str | None = Field(None, description="column of the tools that the template is given; null: none")
    system: str | None = Field(None, description="system turn of conversations that have none; null: none")
    train_on: Literal["assistant", "last"] = Field(
        "assistant", description="assistant (all its turns), or last (its last turn alone)"
    )


class TextFormat(Section):
    """Plain documents, learnt from their second token on; the end-of-text token is appended."""

    type: Literal["text"] = Field(description="text, classification, prompt_completion or chat")
    column: str = Field("text", description="column of the document")


FormatConfig = Annotated[
    ClassificationFormat | PromptCompletionFormat | ChatFormat | TextFormat, Field(discriminator="type")
]


class DataConfig(Section):
    """The data and how rows become tokens."""

    train: DataSetConfig = Field(description="training data")
    evaluation: DataSetConfig | None = Field(None, description="held-out data; null evaluates nothing")
    format: FormatConfig = Field(description="how a row becomes a prompt and the supervised text")
    max_length: int = Field(
        512,
        ge=2,
        description="tokens per sample. Longer prompts lose their beginning, conversations and documents their end; "
        "with packing, documents are cut into several",
    )
    packing: bool = Field(
        False,
        description="fill training samples up to max_length with several rows, which neither see nor shift each other",
    )
    chat_template: str | None = Field(
        None, min_length=1, description="Jinja file or text in place of the tokenizer's chat template; saved with it"
    )

    @model_validator(mode="after")
    def _keys_belong_to_format(self) -> "DataConfig":
        if self.chat_template is not None and not isinstance(self.format, ChatFormat):
            raise ValueError("chat_template: is used by format.type: chat alone; leave it out")
        if self.packing and isinstance(self.format, ClassificationFormat):
            raise ValueError("packing: a classification scores its samples one by one; leave it out")
        return self
