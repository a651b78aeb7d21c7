"""How PostgreSQL reads and writes values wherever they leave Sluice: never as the server happens to be set up."""

# For a SELECT; they hold until the transaction ends. Times without a zone are UTC.
VALUE_SETTINGS = """
    set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO, YMD', true),
    set_config('IntervalStyle', 'postgres', true), set_config('extra_float_digits', '1', true),
    set_config('bytea_output', 'hex', true)
"""
