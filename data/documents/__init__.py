"""Documents of a corpus, as text: files and data sets that hold them, and what of a record is read and learned."""
