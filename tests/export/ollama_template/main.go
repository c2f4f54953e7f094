// Renders an Ollama TEMPLATE the way Ollama does for a chat whose template walks .Messages, with Go's own text/template.
//
// stdin:  {"template": "…", "system": "…", "conversations": [[{"role": "user", "content": "…"}, …], …]}
// stdout: ["the prompt of the first conversation", …]
//
// What Ollama does before the template runs: the Modelfile's SYSTEM goes in front of a conversation that has no system
// message; all system messages joined become .System, and stay in .Messages; neighbours of one role become one message.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"time"
)

type function struct {
	Name      string
	Arguments map[string]any
}

type toolCall struct{ Function function }

type message struct {
	Role       string
	Content    string
	Thinking   string
	Images     [][]byte
	ToolCalls  []toolCall
	ToolName   string
	ToolCallID string
}

type request struct {
	Template      string
	System        string
	Conversations [][]message
}

var functions = template.FuncMap{
	"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	},
	"currentDate":   func(...string) string { return time.Now().Format("2006-01-02") },
	"yesterdayDate": func(...string) string { return time.Now().AddDate(0, 0, -1).Format("2006-01-02") },
}

func withSystem(conversation []message, system string) []message {
	if system == "" || len(conversation) > 0 && conversation[0].Role == "system" {
		return conversation
	}
	return append([]message{{Role: "system", Content: system}}, conversation...)
}

func collate(conversation []message) (string, []*message) {
	var system []string
	var joined []*message
	for i := range conversation {
		next := conversation[i]
		if next.Role == "system" {
			system = append(system, next.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == next.Role {
			joined[last].Content += "\n\n" + next.Content
		} else {
			joined = append(joined, &next)
		}
	}
	return strings.Join(system, "\n\n"), joined
}

func render(parsed *template.Template, conversation []message) (string, error) {
	system, messages := collate(conversation)
	var text strings.Builder
	err := parsed.Execute(&text, map[string]any{
		"System": system, "Messages": messages, "Tools": nil, "Response": "",
		"Think": false, "ThinkLevel": "", "IsThinkSet": false,
	})
	return text.String(), err
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	var asked request
	fail(json.NewDecoder(os.Stdin).Decode(&asked))
	if !strings.Contains(asked.Template, ".Messages") {
		fail(fmt.Errorf("the template does not walk .Messages: Ollama would run it once for each turn"))
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(asked.Template)
	fail(err)
	answers := []string{}
	for _, conversation := range asked.Conversations {
		text, err := render(parsed, withSystem(conversation, asked.System))
		fail(err)
		answers = append(answers, text)
	}
	fail(json.NewEncoder(os.Stdout).Encode(answers))
}
