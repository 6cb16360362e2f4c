"""How one question is put to a model: around the chat template, without a first token that the tokenizer adds itself."""

from sgl_bdlora.info import prompt_format


class Tokenizer:
    def __init__(self, template: str | None, bos: str | None = None, adds_bos: bool = False):
        self.template, self.bos_token, self.bos_token_id, self.adds_bos = template, bos, 1, adds_bos

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        if self.template is None:
            raise ValueError("no chat template")
        return self.template.replace("%", messages[0]["content"])

    def encode(self, text):
        return [1, 2] if self.adds_bos else [2]


def test_the_template_stands_around_the_prompt():
    assert prompt_format(Tokenizer("<u>%<a>")) == "<u>{prompt}<a>"


def test_the_first_token_is_left_to_a_tokenizer_that_adds_it():
    assert prompt_format(Tokenizer("<s><u>%", "<s>", adds_bos=True)) == "<u>{prompt}"
    assert prompt_format(Tokenizer("<s><u>%", "<s>")) == "<s><u>{prompt}"


def test_without_a_usable_template_the_prompt_goes_as_it_is():
    assert prompt_format(Tokenizer(None)) == "{prompt}"
    assert prompt_format(Tokenizer("%%")) == "{prompt}"
    assert prompt_format(None) == "{prompt}"
