"""The gateway: the OpenAI API over HTTP, on asyncio; every request runs under its caller's own capability.

schema.py        what requests look like; translate.py requests to messages for models (pure)
encoders.py      embeddings and reranking: requests and answers (pure)
errors.py        errors as the OpenAI API shapes them
keys.py          API keys, which are capability tokens, and the kernel's handles for them
choices.py       the streams behind one request; events.py and replies.py what a client reads of them
responses.py     HTTP responses that notice when the client leaves
app.py           the endpoints
registration.py  how this process registers with the kernel; server.py how it is run
"""
