"""AuraFlow: both branches in one batch."""

from diffalign.families.arithmetic import per_thousand
from diffalign.families.family import Family

AURAFLOW = Family("auraflow", pipelines=("AuraFlowPipeline",), time=per_thousand)
