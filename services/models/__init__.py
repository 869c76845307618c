"""The models service: from text to tokens and back.

catalog.py      the models known by name, and what a reference to any other looks like
store.py        where models lie on disk; fetch.py how they get there
gguf.py         the metadata of a GGUF file; tokenizer.py the tokenizer in it, or in a folder
vocabulary.py   or of the vocabulary files in it
template.py     chat templates, sandboxed
detokenizer.py  tokens to whole characters as they come; stops.py stop strings that straddle tokens
requests.py     a request checked and turned into a task for the scheduler
texts.py        texts and pairs as encoders take them; scores.py what their numbers say
encoding.py     embed, rerank and classify under way
generation.py   one answer being generated (no I/O); hosting.py which model is where (no I/O)
loader.py       gets models onto their drivers; parking.py into host memory and back
residence.py    which of them leaves its device, and when (no I/O)
server.py       the message handlers
"""
