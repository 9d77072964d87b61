"""The result document: one versioned JSON object per run, the same envelope for every command.

Field names are stable and carry their unit. A minor version only adds keys, and readers ignore
keys they do not know; a major version may change meaning, and readers refuse it. NaN and infinity
are not JSON and not results: they are refused on the way in and on the way out.
"""

from loftq_cli.schema.comparing import (
    BitsVerdict,
    ComparedMethod,
    CompareResults,
    CompareSettings,
    CompareVerdict,
    DownstreamTask,
    GridVerdict,
    LossPoint,
    TaskScore,
    TaskVerdict,
    Training,
    TrainingRun,
)
from loftq_cli.schema.envelope import (
    SCHEMA_VERSION,
    Accelerator,
    Document,
    Environment,
    ModelIdentity,
    Resolved,
    Results,
    Scalar,
    Tool,
)
from loftq_cli.schema.planning import (
    LayerKind,
    MemoryEstimate,
    RankCost,
    SkippedModule,
    SweepRanksResults,
    SweepSettings,
    TargetPreset,
    TargetsResults,
    Verdict,
)
from loftq_cli.schema.quantizing import (
    AdaptedLayer,
    CalibratedOn,
    Distillation,
    ExpertAdapters,
    Experts,
    ExpertShape,
    ExportResults,
    MergedFrom,
    MergeResults,
    NotCopied,
    PlainLayer,
    PushResults,
    QuantizeResults,
    QuantizeSettings,
    QuantizeTotals,
    Requantized,
    RequantizedLayer,
    SourceFile,
    UntouchedTensor,
    VerifiedLayer,
    VerifyResults,
    WrittenFile,
)
from loftq_cli.schema.reading import (
    RESULTS,
    NotAResultDocument,
    document_of,
    dump_json,
    load_document,
)
from loftq_cli.schema.reporting import Remark, ReportedDocument, ReportResults, SkippedFile
from loftq_cli.schema.running import (
    CheckResults,
    CheckSummary,
    CheckTest,
    GenerateResults,
    Generation,
    LoadResults,
)
