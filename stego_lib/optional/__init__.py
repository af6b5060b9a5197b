"""Loss terms and views of the published code that no recipe uses, and the filter of the CRF where pydensecrf is missing."""
