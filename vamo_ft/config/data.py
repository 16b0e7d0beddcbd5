"""The `data` section: which rows, and how they become tokens."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from vamo_ft.config.objective import FREE_TEXT_METRICS
from vamo_ft.config.sampling import SampleConfig
from vamo_ft.config.section import Section
from vamo_ft.config.tasks import TaskFormat


class ClassificationFormat(Section):
    """Label words after a prompt (causal_lm), or a classifier head (sequence_classification)."""

    type: Literal["classification"] = Field(description="classification, prompt_completion, chat, text or task")
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

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.labels)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be measured beside the loss."""
        return ("accuracy",)


class FreeText(Section):
    """A format of rows without classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """There are none."""
        return ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be measured beside the loss."""
        return FREE_TEXT_METRICS


class PromptCompletionFormat(FreeText):
    """A prompt and the text to learn; the end-of-text token is appended to the completion."""

    type: Literal["prompt_completion"] = Field(description="prompt_completion, classification, chat, text or task")
    prompt: str = Field("{prompt}", description="the prompt, with columns in braces")
    completion: str = Field("{completion}", description="the text to learn, with columns in braces")


class ChatFormat(FreeText):
    """Conversations through the tokenizer's chat template; what the assistant says is learnt."""

    type: Literal["chat"] = Field(description="chat, classification, prompt_completion, text or task")
    messages: str = Field(
        "messages",
        description="column of the conversation: a list of {role, content}, or of ShareGPT's {from, value}",
    )
    tools: str | None = Field(None, description="column of the tools that the template is given; null: none")
    system: str | None = Field(None, description="system turn of conversations that have none; null: none")
    train_on: Literal["assistant", "last"] = Field(
        "assistant", description="assistant (all its turns), or last (its last turn alone)"
    )


class TextFormat(FreeText):
    """Plain documents, learnt from their second token on; the end-of-text token is appended."""

    type: Literal["text"] = Field(description="text, classification, prompt_completion, chat or task")
    column: str = Field("text", description="column of the document")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be measured beside the loss."""
        return ("perplexity",)


FormatConfig = Annotated[
    ClassificationFormat | PromptCompletionFormat | ChatFormat | TextFormat | TaskFormat, Field(discriminator="type")
]


def same_classes(one: FormatConfig, other: FormatConfig) -> bool:
    """Whether samples of the two can be scored alike: the type, and labels with their texts and their order."""
    if isinstance(one, ClassificationFormat) and isinstance(other, ClassificationFormat):
        return list(one.labels.items()) == list(other.labels.items())
    if isinstance(one, TaskFormat) and isinstance(other, TaskFormat):
        return one.name == other.name
    return one.type == other.type


class DataSetConfig(Section):
    """One data set."""

    path: str = Field(min_length=1, description="local .jsonl .json .csv .parquet file or folder, or a Hub data set id")
    name: str | None = Field(None, description="configuration of a Hub data set")
    split: str | None = Field(
        None,
        min_length=1,
        description="split of a Hub data set or folder, or a part of one, such as 'train[:1000]', 'train[10%:20%]' or "
        "'train+validation'; the split of a file is train. Default train",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hub data set")
    limit: int | None = Field(None, gt=0, description="use the first rows only")
    sample: SampleConfig | None = Field(None, description="use rows drawn at random, after limit; null: all")
    streaming: bool = Field(
        False, description="read the first `limit` rows of a Hub data set without downloading the others"
    )
    columns: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        {}, description="names for columns: new name -> the data set's own name"
    )
    format: FormatConfig | None = Field(None, description="how its rows become text; null: data.format")

    @model_validator(mode="after")
    def _a_stream_has_an_end(self) -> "DataSetConfig":
        if self.streaming and self.limit is None:
            raise ValueError("limit: needed with streaming: true, which reads so many rows and no more")
        if self.streaming and "[" in (self.split or ""):
            raise ValueError("split: a part of a split cannot be streamed; write the split's name, and limit")
        return self


class MixedSetConfig(DataSetConfig):
    """One of several data sets."""

    weight: float | None = Field(
        None,
        gt=0,
        description="its share of the samples that training draws, relative to the others' weights; null for all of "
        "them: every sample as often as any other",
    )


def _one_or_several(value: Any) -> str:
    return "list[MixedSetConfig]" if isinstance(value, list) else "DataSetConfig"


TrainingSets = Annotated[
    Annotated[DataSetConfig, Tag("DataSetConfig")] | Annotated[list[MixedSetConfig], Tag("list[MixedSetConfig]")],
    Discriminator(_one_or_several),
]


class DataConfig(Section):
    """The data and how rows become tokens."""

    train: TrainingSets = Field(description="training data: one data set, or a list of several")
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

    @property
    def training_sets(self) -> tuple[DataSetConfig, ...]:
        """The data sets of the training data."""
        return (self.train,) if isinstance(self.train, DataSetConfig) else tuple(self.train)

    @property
    def training_paths(self) -> list[str]:
        """Where the training data comes from, each place once."""
        return list(dict.fromkeys(each.path for each in self.training_sets))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The share of each training set, in any unit; None: every sample as often as any other."""
        if isinstance(self.train, DataSetConfig):
            return None
        weights = tuple(each.weight for each in self.train if each.weight is not None)
        return weights or None

    @property
    def places(self) -> tuple[tuple[str, DataSetConfig], ...]:
        """Every data set under its key in this section, those of the training data first."""
        single = isinstance(self.train, DataSetConfig)
        train = [("train" if single else f"train.{number}", each) for number, each in enumerate(self.training_sets)]
        return (*train, *([] if self.evaluation is None else [("evaluation", self.evaluation)]))

    @property
    def own_formats(self) -> tuple[FormatConfig | None, ...]:
        """The formats that data sets have for themselves, the held-out one included."""
        return tuple(each.format for _, each in self.places)

    def of(self, data_set: DataSetConfig) -> "DataConfig":
        """What holds for `data_set`, which may have a format of its own."""
        return self if data_set.format is None else self.model_copy(update={"format": data_set.format})

    def format_key(self, data_set: DataSetConfig) -> str:
        """The key of the format that holds for `data_set`, which may be another one with the format of one of these."""
        if data_set.format is None:
            return "data.format"
        same = [place for place, each in self.places if each == data_set]
        alike = [place for place, each in self.places if each.format == data_set.format]
        return ".".join(["data", *(same or alike)[:1], "format"])

    @model_validator(mode="after")
    def _a_mixture_is_whole(self) -> "DataConfig":
        if isinstance(self.train, DataSetConfig):
            return self
        if not self.train:
            raise ValueError("train: names no data set")
        if len({each.weight is None for each in self.train}) > 1:
            raise ValueError("train: a weight for every data set, or for none")
        return self

    @model_validator(mode="after")
    def _evaluation_is_of_the_format(self) -> "DataConfig":
        own = None if self.evaluation is None else self.evaluation.format
        if own is not None and own.type != self.format.type:
            raise ValueError(f"evaluation.format.type: must be that of data.format, {self.format.type}")
        if isinstance(own, TaskFormat) and isinstance(self.format, TaskFormat) and own.metrics != self.format.metrics:
            raise ValueError(
                f"evaluation.format.name: {own.name} is not scored as data.format's {self.format.name} is: of one "
                "answers are generated, of the other options are compared"
            )
        return self

    @model_validator(mode="after")
    def _samples_per_class_have_classes(self) -> "DataConfig":
        for key, data_set in self.places:
            sample, written = data_set.sample, data_set.format or self.format
            if sample is not None and sample.per_class is not None and not written.classes:
                raise ValueError(f"{key}.sample.per_class: the format's rows have no classes; write size")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_format(self) -> "DataConfig":
        formats = [each.format or self.format for each in self.training_sets]
        if self.chat_template is not None and not any(isinstance(each, ChatFormat) for each in formats):
            raise ValueError("chat_template: is used by format.type: chat alone; leave it out")
        if self.packing and any("accuracy" in each.metrics for each in formats):
            raise ValueError("packing: a classification scores its samples one by one; leave it out")
        return self
