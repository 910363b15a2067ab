"""Commands and views of integrations with other engines."""
