"""The maths of TGV-KV as plain torch functions, and the opaque ops made of them (`docs/algorithm.md`)."""
