"""How a verb is told where labelled data have their texts and labels: options that all verbs spell alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Train = Annotated[Path, Parameter(help="Labelled data: jsonl, csv, tsv, CoNLL, SQuAD, or nested JSON.")]
Validation = Annotated[
    Path | None, Parameter(help="Data to choose the best weights by; none: a tenth of the training data.")
]
LabelColumn = Annotated[str | None, Parameter(help="The column of the labels, or its number without a header.")]
Header = Annotated[bool, Parameter(help="Whether the first row names the columns.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table and the part of a nested file, for `api.finetune(**vars(columns))`."""

    text_column: Annotated[
        str | None, Parameter(help='The column of the texts, or its number without a header; "a,b" is a pair.')
    ] = None
    label_column: LabelColumn = None
    header: Header = True
    split: Annotated[
        str | None, Parameter(help='The part of a nested file to use; "train,val" also names the one to judge by.')
    ] = None
