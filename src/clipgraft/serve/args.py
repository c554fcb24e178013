"""Options of serving."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipgraft.options import Options, Several, UserPath, Words, within

Seconds = Annotated[float, within(0.001, 86_400, "with more, nobody waits for it")]
Milliseconds = Annotated[float, within(0, 10_000, "with more, every request waits for it")]
Megabytes = Annotated[float, within(0.001, 1e6, "with less, nothing fits in; with more, no machine has it")]
Many = Annotated[int, within(1, 1_000_000, "with more, memory does not hold them")]


class ServiceArgs(Options):
    """Options of a model that is served: its adapters, batches and limits."""

    adapters: Annotated[Words, Several()] = Field(
        (),
        description="adapters to register: NAME=PATH, a folder of adapters or runs, or one adapter; "
        "each is read when it is first asked for",
    )
    folders: Annotated[Words, Several()] = Field(
        (), description="encoded folders to search: NAME=PATH, or the path of what `clipgraft encode` wrote"
    )
    adapter_memory_mb: Megabytes = Field(
        2048, description="memory for adapters; those not asked for longest leave it first"
    )
    max_wait_ms: Milliseconds = Field(
        20,
        description="how long a batch waits at most for as many texts and images as there were before it",
    )
    max_batch_tokens: Many | None = Field(
        None, description="most tokens and patches computed at once (default: found by measurement)"
    )
    max_queue_seconds: Seconds = Field(
        10, description="refuse requests (429) once what is waiting would take longer"
    )
    timeout: Seconds = Field(30, description="seconds within which a request is answered, or refused (503)")


class WebArgs(Options):
    """Options of the HTTP server."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 for any free one")
    uds: UserPath | None = Field(None, description="Unix socket to listen on instead")
    workers: Annotated[int, within(1, 1024, "no machine has as many cores")] = Field(
        1, description="processes, each with a model, that share the port"
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="what runs the models: processes here, or replicas of Ray Serve"
    )
    ray_address: str | None = Field(None, min_length=1, description="as for `clipgraft encode`")
    api_keys: UserPath | None = Field(
        None,
        description="file with one key a line that requests must bring (also CLIPGRAFT_API_KEYS, by commas)",
    )
    allow_urls: bool = Field(False, description="fetch images from public addresses that requests name")
    url_hosts: Annotated[Words, Several()] = Field((), description="fetch images only from these hosts")
    allow_adapter_loading: bool = Field(
        False, description="let requests load and unload adapters (/v1/load_lora_adapter)"
    )
    adapter_root: UserPath | None = Field(
        None, description="folder that adapters loaded by requests must lie in"
    )
    cors: Annotated[Words, Several()] = Field(
        (), description="origins whose pages may call the server; * for all"
    )
    allowed_hosts: Annotated[Words, Several()] = Field(
        (), description="names that clients may call the server by, beside its address; * for any"
    )
    max_body_mb: Megabytes = Field(32, description="largest request")
    max_items: Many = Field(2048, description="most texts and images of one request")
    drain_seconds: Seconds = Field(20, description="how long a stop waits for requests under way")
    page: bool = Field(True, description="show the search page at /")
    log_format: Literal["text", "json"] = Field("text", description="lines of the request log")
