"""Which functions of servd are recorded, in the front process and in the worker, and how they are called in tables.

Owns the names of parts of a step. A function that is gone is told, not passed over in silence.
"""

from __future__ import annotations

IDLE = "idle"
PLAN = "plan"
WIRE = "wire"
PACK = "pack"
FORWARD = "forward"
LOGITS = "logits"
SAMPLE = "sample"
STEP = "step"
OUTPUT = "output"
HTTP = "http"

_CHANNEL = "servd.executor.shm_channel:ShmChannel"

# The worker's main thread; what is called within another is a child of it.
WORKER = (
    (f"{WIRE}: receive", f"{_CHANNEL}.wait"),
    (IDLE, f"{_CHANNEL}._poll"),
    (f"{WIRE}: decode", "servd.executor.protocol:decode_to_worker"),
    (f"{WIRE}: encode", "servd.executor.protocol:encode"),
    (f"{WIRE}: send", "servd.worker.main:_send"),
    (STEP, "servd.worker.main:_execute"),
    (f"{PACK}: apply the plan", "servd.worker.input_batch:InputBatch.apply"),
    (f"{PACK}: arrays", "servd.worker.input_batch:InputBatch.pack"),
    (f"{PACK}: tensors", "servd.worker.model_runner:ModelRunner._attention"),
    (FORWARD, "servd.worker.model_runner:ModelRunner._forward"),
    (LOGITS, "servd.models.decoder:DecoderModel.compute_logits"),
    (SAMPLE, "servd.worker.sampler:Sampler.__call__"),
    (f"{SAMPLE}: remember", "servd.worker.input_batch:InputBatch.append_tokens"),
)

# The front's event loop.
FRONT = (
    (f"{PLAN}: fill", "servd.engine.core:EngineCore._fill"),
    (f"{PLAN}: schedule", "servd.scheduler.scheduler:Scheduler.schedule"),
    (f"{WIRE}: submit", "servd.executor.multiproc:MultiprocExecutor.submit"),
    (f"{WIRE}: receive", "servd.executor.multiproc:_Rank._readable"),
    (f"{WIRE}: decode", "servd.executor.protocol:decode_to_front"),
    (f"{WIRE}: encode", "servd.executor.protocol:encode"),
    (f"{PLAN}: collect", "servd.engine.core:EngineCore._collect"),
    (f"{PLAN}: results", "servd.scheduler.scheduler:Scheduler.update_from_output"),
    (OUTPUT, "servd.engine.output_processor:OutputProcessor.process"),
    (f"{OUTPUT}: detokenize", "servd.engine.output_processor:_AnswerState.new_text"),
    (f"{HTTP}: events", "servd.api.http.sse:_events"),
)
