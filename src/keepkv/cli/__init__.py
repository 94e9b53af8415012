"""The command line: everything that parses options or prints. Nothing else imports it."""

from keepkv.cli.app import main as main
