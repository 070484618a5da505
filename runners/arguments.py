"""What several commands of the command line take."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

Set = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", negative="", show_default=False, help="Override one setting: key.path=value. May be repeated."
    ),
]
Label = Annotated[str | None, Parameter(help="Column that holds the labels.")]
Batch = Annotated[
    int, Parameter(validator=Number(gte=1), help="Records predicted before any of their labels is learned.")
]
Seeds = Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="", help="One pass for each.")]
OwnSeeds = Annotated[
    tuple[int, ...], Parameter(consume_multiple=True, negative="", show_default=False, help="One pass for each.")
]
Count = Annotated[int, Parameter(validator=Number(gte=0))]
Some = Annotated[int, Parameter(validator=Number(gte=1))]
Records = Annotated[int | None, Parameter(validator=Number(gte=1), help="End each stream after as many.")]
Json = Annotated[
    str | None, Parameter(allow_leading_hyphen=True, help="Write the figures there; - is standard output.")
]
