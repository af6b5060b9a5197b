"""Loss terms and views of the published code that no recipe uses, approximate neighbors, and the filter of the CRF where pydensecrf is missing."""
