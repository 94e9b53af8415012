"""Documents: texts that were compiled once into compact caches, as values, as .keep files, and in a store.

document.py has what users see; format.py how a .keep file is laid out and proved whole, packing.py how a cache becomes tensors
and back, identity.py which model a file belongs to, store.py a folder of files with an index, tiers.py which of them are in
memory, batch.py compiling many, joining/ several documents in one prompt.
"""
