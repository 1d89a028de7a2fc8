"""A server as many are written: FastAPI around a pipeline of transformers.

python pipeline_server.py MODEL TASK PORT
"""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

model, task, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
answer = pipeline(task, model=model, tokenizer=model)
app = FastAPI()


class Text(BaseModel):
    text: str


class Inputs(BaseModel):
    input: str | list[str]


@app.post("/classify")
def classify(body: Text):
    return {"answers": [answer(body.text)[0]]}


@app.post("/v1/embeddings")
def embeddings(body: Inputs):
    texts = [body.input] if isinstance(body.input, str) else body.input
    vectors = [rows[0].mean(dim=0) for rows in answer(texts, return_tensors=True)]
    return {"data": [{"index": i, "embedding": (v / v.norm()).tolist()} for i, v in enumerate(vectors)]}


uvicorn.run(app, port=port, log_level="warning")
