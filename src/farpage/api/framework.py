"""What control APIs are made of: FastAPI, imported in a way that takes a daemon less time to start.

FastAPI's own documents, those of the OpenAPI description, are many and are needed when somebody asks for that
description; here they are built then, as farpage's own are (`defer_build` of pydantic's configuration, which
documents inherit). Import FastAPI's names from here.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

_usual = BaseModel.model_config
BaseModel.model_config = ConfigDict(defer_build=True)
try:
    from fastapi import FastAPI, Path, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
finally:
    BaseModel.model_config = _usual

__all__ = ["FastAPI", "JSONResponse", "Path", "Query", "Request", "RequestValidationError", "Response"]
